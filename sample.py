"""Sample from the shell: `python sample.py text "a red apple"`; see unclip/cli/app.py."""

from unclip.cli import main

if __name__ == "__main__":
    main()

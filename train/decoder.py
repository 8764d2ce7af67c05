"""Train the decoder (Section 2.1): accelerate launch train/decoder.py CONFIG [key=value …]."""

import sys

from unclip.train import main

if __name__ == "__main__":
    main(["decoder", *sys.argv[1:]])

"""Train a CLIP encoder from scratch (Section 2): accelerate launch train/clip.py CONFIG."""

import sys

from unclip.train import main

if __name__ == "__main__":
    main(["clip", *sys.argv[1:]])

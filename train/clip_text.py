"""Teach a trained CLIP's text tower more words: accelerate launch train/clip_text.py CONFIG."""

import sys

from unclip.train import main

if __name__ == "__main__":
    main(["clip-text", *sys.argv[1:]])

"""Train an upsampler (Section 2.1): accelerate launch train/upsampler.py CONFIG [key=value …]."""

import sys

from unclip.train import main

if __name__ == "__main__":
    main(["upsampler", *sys.argv[1:]])

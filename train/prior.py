"""Train the diffusion prior (Section 2.2): accelerate launch train/prior.py CONFIG."""

import sys

from unclip.train import main

if __name__ == "__main__":
    main(["prior", *sys.argv[1:]])

"""Train the autoregressive prior (Section 2.2): accelerate launch train/ar_prior.py CONFIG."""

import sys

from unclip.train import main

if __name__ == "__main__":
    main(["ar-prior", *sys.argv[1:]])

"""Train the autoregressive prior (Section 2.2): accelerate launch train/ar_prior.py CONFIG."""

from unclip.training.ar_prior import ArPriorRun, train_ar_prior
from unclip.training.launch import main

if __name__ == "__main__":
    main(ArPriorRun, train_ar_prior, "Train the autoregressive prior (Section 2.2).")

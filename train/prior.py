"""Train the diffusion prior (Section 2.2): accelerate launch train/prior.py CONFIG."""

from unclip.training.launch import main
from unclip.training.prior import PriorRun, train_prior

if __name__ == "__main__":
    main(PriorRun, train_prior, "Train the diffusion prior (Section 2.2).")

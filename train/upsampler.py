"""Train an upsampler (Section 2.1): accelerate launch train/upsampler.py CONFIG [key=value …]."""

from unclip.training.launch import main
from unclip.training.upsampler import UpsamplerRun, train_upsampler

if __name__ == "__main__":
    main(UpsamplerRun, train_upsampler, "Train an upsampler (Section 2.1).")

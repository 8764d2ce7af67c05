"""Train a CLIP encoder from scratch (Section 2): accelerate launch train/clip.py CONFIG."""

from unclip.training.clip import ClipRun, train_clip
from unclip.training.launch import main

if __name__ == "__main__":
    main(ClipRun, train_clip, "Train a CLIP encoder from scratch (Section 2).")

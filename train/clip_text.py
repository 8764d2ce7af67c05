"""Teach a trained CLIP's text tower more words: accelerate launch train/clip_text.py CONFIG."""

from unclip.training.clip_text import ClipTextRun, train_clip_text
from unclip.training.launch import main

if __name__ == "__main__":
    main(ClipTextRun, train_clip_text, "Teach a trained CLIP's text tower more words (Section 2).")

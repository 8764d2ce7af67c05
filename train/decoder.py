"""Train the decoder (Section 2.1): accelerate launch train/decoder.py CONFIG [key=value …]."""

from unclip.training.launch import main
from unclip.training.tasks import DecoderRun, train_decoder

if __name__ == "__main__":
    main(DecoderRun, train_decoder, "Train the decoder (Section 2.1).")

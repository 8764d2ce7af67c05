"""Train the decoder (Section 2.1): accelerate launch train/decoder.py CONFIG [key=value …]."""

from unclip.training.decoder import DecoderRun, train_decoder
from unclip.training.launch import main

if __name__ == "__main__":
    main(DecoderRun, train_decoder, "Train the decoder (Section 2.1).")

"""Write a cache of CLIP embeddings: accelerate launch train/embed.py DATA CACHE --clip CLIP."""

import sys

from unclip.train import main

if __name__ == "__main__":
    main(["embed", *sys.argv[1:]])

"""Write a cache of CLIP embeddings: accelerate launch train/embed.py DATA CACHE --clip CLIP."""

from unclip.training.embed import main

if __name__ == "__main__":
    main()

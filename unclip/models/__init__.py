"""The networks: prior, decoder and upsamplers. All are called `model(x_t, t, cond)`."""

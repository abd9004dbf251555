"""Methods that train through the encoder, one file each; stage 2 imports nothing of it."""

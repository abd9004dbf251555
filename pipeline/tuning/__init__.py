"""What every early fusion runs on: backbone, batches, loop, run folder. The methods are elsewhere."""

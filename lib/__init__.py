"""What all scripts share: streaming, checkpoints, records of results, pictures, docs."""

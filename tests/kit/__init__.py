"""What several tests share: references, streams, given gradients, workers."""

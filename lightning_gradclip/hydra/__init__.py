"""Makes the configuration pack known to Hydra. Nothing here imports torch or Lightning."""

"""What clipping did, on one HTML page, and which limits a recorded run suggests; both read files and need no torch."""

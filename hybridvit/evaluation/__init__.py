"""What a trained model is worth: accuracy and probes of its frozen features."""

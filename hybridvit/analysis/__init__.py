"""What a model is and costs, measured without training it."""

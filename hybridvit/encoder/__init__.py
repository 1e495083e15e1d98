"""The one ViT encoder that every stem and objective shares."""

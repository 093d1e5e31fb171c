"""Where backbones and their weights come from."""

"""Where images of data sets lie, and which masks belong to them."""

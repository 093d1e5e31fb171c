"""How a network is trained, and how what was trained is kept."""

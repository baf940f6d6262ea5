"""What is compared: the methods, the settings that a search may give them, and questions about them."""

"""Every replacement against its default: the calls, and how far the results lie apart."""

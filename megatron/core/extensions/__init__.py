"""Layer classes under the names that other libraries gave them."""

"""What operators read of a service: figures, and a line for each request and event."""

"""The engine: requests, their queue and schedule, and the passes that answer them."""

"""The HTTP side of the service: routes, middleware, schemas and streaming."""

"""pyproxy: makes the Services of a Kubernetes cluster work on one Linux node."""

__version__ = "0.1.0"

"""Services from manifest files, for a Linux machine without a cluster."""

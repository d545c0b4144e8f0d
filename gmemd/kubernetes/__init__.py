"""gmemd-dra: guest memory as a device that Kubernetes allocates (Dynamic Resource Allocation, resource.k8s.io/v1)."""

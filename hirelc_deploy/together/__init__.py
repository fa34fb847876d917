"""The same work side by side: processes of this machine, hosts of a Ray cluster."""

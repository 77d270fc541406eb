"""The networks in plain torch: the mathematics, the parameter names in the weights, and what trains."""

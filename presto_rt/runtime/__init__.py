"""The runtime: plans, static memory and the backends that execute them."""

"""Training beside serving: jobs, their queue, and the process that trains one of them."""

"""Reading the residual stream at every depth: the logit lens and the tuned lens."""

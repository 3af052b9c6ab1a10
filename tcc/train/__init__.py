"""Learning what to cache: training of routers and predictors on a frozen model."""

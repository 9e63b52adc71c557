"""Many ranks: layouts, and collectives as nodes of a graph and as steps of a plan."""

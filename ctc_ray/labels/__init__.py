"""Label events, the consensus that turns them into labels, their import and export, and the simulated expert."""

"""From noise to pictures: the ODE of flow matching, its solvers and time grids, guidance."""

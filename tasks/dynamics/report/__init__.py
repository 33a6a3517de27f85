# SPDX-License-Identifier: Apache-2.0
"""After a test or predict: how the gate divides, figures, predicted trajectories."""

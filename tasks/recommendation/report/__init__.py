# SPDX-License-Identifier: Apache-2.0
"""After a test or predict: are the experts well, scores by category, tables of probabilities."""

# SPDX-License-Identifier: Apache-2.0
"""The seen/unseen matrix of runs, intervals and paired comparisons."""

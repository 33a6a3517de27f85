# SPDX-License-Identifier: Apache-2.0
"""During training and after a test: samples, how good they are, what experts know."""

# SPDX-License-Identifier: Apache-2.0
"""After a test or predict: what experts know, figures, tables, labelled scans."""

// SPDX-License-Identifier: Apache-2.0
//! Tables for people: columns as wide as their widest cell, and the last one open.

use std::fmt;

/// Narrowest column, and the space between two, as runc has them.
const MIN_WIDTH: usize = 12;
const GAP: usize = 3;

/// A table of `N` columns.
#[derive(Debug)]
pub(super) struct Table<const N: usize> {
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    pub(super) fn new(header: [&str; N]) -> Self {
        Self { rows: vec![header.map(str::to_owned)] }
    }

    pub(super) fn add(&mut self, row: [String; N]) {
        self.rows.push(row);
    }
}

impl<const N: usize> fmt::Display for Table<N> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut widths = [MIN_WIDTH; N];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count() + GAP);
            }
        }
        for row in &self.rows {
            let (last, cells) = row.split_last().map_or(("", &[][..]), |(last, cells)| (last.as_str(), cells));
            for (cell, width) in cells.iter().zip(widths) {
                write!(out, "{cell:width$}")?;
            }
            writeln!(out, "{last}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_have_to_be() {
        let mut table = Table::new(["ID", "PATH", "LAST"]);
        table.add(["c1".into(), "/a/longer/path".into(), "x".into()]);

        assert_eq!(table.to_string(), "ID          PATH             LAST\nc1          /a/longer/path   x\n");
    }
}

//! One table of the configuration file, and which of its keys have been asked for.
//!
//! The keys that exist are exactly those that were asked for: so a key that nobody asks for is refused with
//! the nearest of them, and no list of keys is kept that could be wrong.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{Complaint, Fault};
use crate::control::suggest;
use crate::control::value::ValueError;

/// One table of the file, and which of its keys have been asked for.
pub(super) struct Section<'a> {
    title: &'static str,
    /// Where it is in the text.
    pub(super) at: Range<usize>,
    table: &'a DeTable<'a>,
    known: Vec<&'static str>,
}

impl<'a> Section<'a> {
    pub(super) fn new(title: &'static str, at: Range<usize>, table: &'a DeTable<'a>) -> Self {
        Self { title, at, table, known: Vec::new() }
    }

    fn get(&mut self, key: &'static str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.known.push(key);
        self.table.get(key)
    }

    /// The tables of an array of tables.
    pub(super) fn sections(
        &mut self,
        key: &'static str,
        title: &'static str,
    ) -> Result<Vec<Section<'a>>, Fault> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let expected = match key {
            "cache" => "written as [[cache]]",
            _ => "written as [[volume]]",
        };
        let wrong = |value: &Spanned<DeValue<'_>>| wrong_type(key, value, expected);
        let array = value.get_ref().as_array().ok_or_else(|| wrong(value))?;
        array
            .iter()
            .map(|item| match item.get_ref().as_table() {
                Some(table) => Ok(Section::new(title, item.span(), table)),
                None => Err(wrong(item)),
            })
            .collect()
    }

    /// A table.
    pub(super) fn section(
        &mut self,
        key: &'static str,
        title: &'static str,
    ) -> Result<Option<Section<'a>>, Fault> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.get_ref().as_table() {
            Some(table) => Ok(Some(Section::new(title, value.span(), table))),
            None => Err(wrong_type(key, value, "a table")),
        }
    }

    /// A string and where it is.
    pub(super) fn located(&mut self, key: &'static str) -> Result<Option<(&'a str, Range<usize>)>, Fault> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.get_ref().as_str() {
            Some(text) => Ok(Some((text, value.span()))),
            None => Err(wrong_type(key, value, "a string")),
        }
    }

    pub(super) fn text<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, ValueError>,
    ) -> Result<Option<T>, Fault> {
        let Some((text, span)) = self.located(key)? else { return Ok(None) };
        parse(text).map(Some).map_err(|source| Fault(span, Complaint::Value { key, source }))
    }

    /// A list of strings.
    pub(super) fn texts<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, ValueError>,
    ) -> Result<Vec<T>, Fault> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let list = value.get_ref().as_array();
        let list = list.ok_or_else(|| wrong_type(key, value, "a list of strings"))?;
        list.iter()
            .map(|item| {
                let text = item.get_ref().as_str();
                let text = text.ok_or_else(|| wrong_type(key, item, "a list of strings"))?;
                parse(text).map_err(|source| Fault(item.span(), Complaint::Value { key, source }))
            })
            .collect()
    }

    /// A string with a unit. A bare number is refused: nobody counts the digits of 4294967296.
    pub(super) fn size<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, ValueError>,
    ) -> Result<Option<T>, Fault> {
        match self.table.get(key) {
            Some(value) if value.get_ref().is_integer() => {
                Err(wrong_type(key, value, "a string with a unit, like \"4GiB\""))
            }
            _ => self.text(key, parse),
        }
    }

    pub(super) fn number<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, ValueError>,
    ) -> Result<Option<T>, Fault> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let integer = value.get_ref().as_integer().ok_or_else(|| wrong_type(key, value, "an integer"))?;
        let text = i64::from_str_radix(integer.as_str(), integer.radix())
            .map_or_else(|_| integer.as_str().to_owned(), |number| number.to_string());
        parse(&text).map(Some).map_err(|source| Fault(value.span(), Complaint::Value { key, source }))
    }

    pub(super) fn flag(&mut self, key: &'static str) -> Result<bool, Fault> {
        Ok(self.choice(key)?.unwrap_or(false))
    }

    /// A flag of which it matters whether it was said.
    pub(super) fn choice(&mut self, key: &'static str) -> Result<Option<bool>, Fault> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.get_ref().as_bool().map(Some).ok_or_else(|| wrong_type(key, value, "true or false"))
    }

    pub(super) fn required<T>(&self, key: &'static str, value: Option<T>) -> Result<T, Fault> {
        // A missing key is often a misspelt one, and then the misspelling is the better message.
        self.refuse_unknown()?;
        value.ok_or_else(|| Fault(self.at.clone(), Complaint::Missing { key, section: self.title }))
    }

    pub(super) fn finish(self) -> Result<(), Fault> {
        self.refuse_unknown()
    }

    fn refuse_unknown(&self) -> Result<(), Fault> {
        let unknown = self.table.keys().filter(|key| !self.known.contains(&key.get_ref().as_ref()));
        let Some(first) = unknown.min_by_key(|key| key.span().start) else { return Ok(()) };
        let key = first.get_ref().to_string();
        let nearest = suggest::nearest(&key, self.known.iter().copied());
        let nearest = self.known.iter().copied().find(|known| Some(*known) == nearest);
        Err(Fault(first.span(), Complaint::UnknownKey { key, section: self.title, nearest }))
    }
}

fn wrong_type(key: &'static str, value: &Spanned<DeValue<'_>>, expected: &'static str) -> Fault {
    let found = match value.get_ref() {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a fraction",
        DeValue::Boolean(_) => "a truth value",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    };
    Fault(value.span(), Complaint::Type { key, found, expected })
}

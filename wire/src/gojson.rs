//! JSON as Go's `encoding/json` writes and reads it.
//!
//! Writing: field order as declared, `<`, `>`, `&`, U+2028 and U+2029 escaped, map keys sorted as text.
//! Reading: unknown fields are ignored, names match regardless of ASCII case (an exact match goes first), `null`
//! stands for the zero value. Stricter than Go in one point: a field or map key that occurs twice is an error, so
//! that two readers of the same bytes cannot come to different conclusions.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::net::IpAddr;

use bytes::Bytes;
use serde::de::{DeserializeOwned, DeserializeSeed, Error as _, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ValueError;

/// Reads a value of at most `limit` bytes.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8], limit: usize) -> Result<T, ValueError> {
    if bytes.len() > limit {
        return Err(ValueError::TooLarge { size: bytes.len(), limit });
    }
    serde_json::from_slice(bytes).or_else(|_| locate(bytes))
}

/// Decodes once more, now keeping track of where it is: good values do not pay for the path.
#[cold]
fn locate<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ValueError> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut deserializer)
        .map_err(|error| ValueError::field(error.path(), error.inner()))?;
    deserializer.end().map_err(|error| ValueError::field(".", error))?;
    Ok(value)
}

/// Writes a value; cannot fail, for it goes to memory and every map key is text.
pub(crate) fn encode<T: Serialize>(value: &T) -> Bytes {
    let mut out = Vec::with_capacity(256);
    value
        .serialize(&mut serde_json::Serializer::with_formatter(&mut out, GoFormatter))
        .expect("writing to memory, with text as map keys, cannot fail");
    out.into()
}

struct GoFormatter;

impl serde_json::ser::Formatter for GoFormatter {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, out: &mut W, text: &str) -> io::Result<()> {
        let mut written = 0;
        for (at, found) in text.match_indices(['<', '>', '&', '\u{2028}', '\u{2029}']) {
            out.write_all(&text.as_bytes()[written..at])?;
            out.write_all(match found {
                "<" => br"\u003c",
                ">" => br"\u003e",
                "&" => br"\u0026",
                "\u{2028}" => br"\u2028",
                _ => br"\u2029",
            })?;
            written = at + found.len();
        }
        out.write_all(&text.as_bytes()[written..])
    }
}

/// Whether Go's `omitempty` leaves the field out.
pub(crate) trait Zero {
    fn is_zero(&self) -> bool;
}

impl Zero for bool {
    fn is_zero(&self) -> bool {
        !self
    }
}

impl Zero for String {
    fn is_zero(&self) -> bool {
        self.is_empty()
    }
}

impl<T> Zero for Option<T> {
    fn is_zero(&self) -> bool {
        self.is_none()
    }
}

impl<T> Zero for Vec<T> {
    fn is_zero(&self) -> bool {
        self.is_empty()
    }
}

impl<K, V> Zero for BTreeMap<K, V> {
    fn is_zero(&self) -> bool {
        self.is_empty()
    }
}

/// How a field of type `T` looks in JSON, where that differs from what serde does for `T`.
pub(crate) trait Codec<T> {
    fn serialize<S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error>;
    fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error>;
}

pub(crate) struct Encoded<'a, T, C>(&'a T, PhantomData<C>);

impl<'a, T, C> Encoded<'a, T, C> {
    pub(crate) fn new(value: &'a T) -> Self {
        Self(value, PhantomData)
    }
}

impl<T, C: Codec<T>> Serialize for Encoded<'_, T, C> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        C::serialize(self.0, serializer)
    }
}

pub(crate) struct Decoded<T, C>(pub(crate) T, PhantomData<C>);

impl<'de, T, C: Codec<T>> Deserialize<'de> for Decoded<T, C> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        C::deserialize(deserializer).map(|value| Self(value, PhantomData))
    }
}

/// As serde does it.
pub(crate) struct Plain;

impl<T: Serialize + DeserializeOwned> Codec<T> for Plain {
    fn serialize<S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        value.serialize(serializer)
    }

    fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
        T::deserialize(deserializer)
    }
}

/// Go's `net.IP`: text, `""` for none, an IPv4 address never in its IPv6-mapped form.
pub(crate) struct NetIp;

impl Codec<Option<IpAddr>> for NetIp {
    fn serialize<S: Serializer>(value: &Option<IpAddr>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(ip) => serializer.collect_str(&ip.to_canonical()),
            None => serializer.serialize_str(""),
        }
    }

    fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<IpAddr>, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.is_empty() {
            return Ok(None);
        }
        parse_ip(&text).map(Some).map_err(D::Error::custom)
    }
}

/// A nil slice: an empty list is written as `null`.
pub(crate) struct NullIfEmpty;

impl<T: Serialize + DeserializeOwned> Codec<Vec<T>> for NullIfEmpty {
    fn serialize<S: Serializer>(value: &Vec<T>, serializer: S) -> Result<S::Ok, S::Error> {
        if value.is_empty() { serializer.serialize_none() } else { value.serialize(serializer) }
    }

    fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
        Vec::deserialize(deserializer)
    }
}

/// A map whose keys are addresses. Written in the order of the keys' text, as Go does.
pub(crate) struct ByIp<C = Plain>(PhantomData<C>);

impl<V, C: Codec<V>> Codec<BTreeMap<IpAddr, V>> for ByIp<C> {
    fn serialize<S: Serializer>(value: &BTreeMap<IpAddr, V>, serializer: S) -> Result<S::Ok, S::Error> {
        let mut entries: Vec<_> = value.iter().map(|(ip, value)| (ip.to_string(), value)).collect();
        entries.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        let mut map = serializer.serialize_map(Some(entries.len()))?;
        for (ip, value) in entries {
            map.serialize_entry(&ip, &Encoded::<V, C>::new(value))?;
        }
        map.end()
    }

    fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<IpAddr, V>, D::Error> {
        deserializer.deserialize_map(UniqueMap::<IpKey, IpAddr, V, C>(PhantomData))
    }
}

/// A map whose keys are text.
pub(crate) struct ByName<C = Plain>(PhantomData<C>);

impl<V, C: Codec<V>> Codec<BTreeMap<String, V>> for ByName<C> {
    fn serialize<S: Serializer>(value: &BTreeMap<String, V>, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(value.len()))?;
        for (name, value) in value {
            map.serialize_entry(name, &Encoded::<V, C>::new(value))?;
        }
        map.end()
    }

    fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, V>, D::Error> {
        deserializer.deserialize_map(UniqueMap::<String, String, V, C>(PhantomData))
    }
}

/// A pointer to something with a codec: `null` for none.
pub(crate) struct Nullable<C>(PhantomData<C>);

impl<T, C: Codec<T>> Codec<Option<T>> for Nullable<C> {
    fn serialize<S: Serializer>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => C::serialize(value, serializer),
            None => serializer.serialize_none(),
        }
    }

    fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
        Ok(Option::<Decoded<T, C>>::deserialize(deserializer)?.map(|decoded| decoded.0))
    }
}

struct IpKey(IpAddr);

impl From<IpKey> for IpAddr {
    fn from(key: IpKey) -> Self {
        key.0
    }
}

impl<'de> Deserialize<'de> for IpKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parse_ip(&String::deserialize(deserializer)?).map(Self).map_err(D::Error::custom)
    }
}

/// Reads a map of plain values; a key that occurs twice is an error.
pub(crate) fn unique_map<'de, D, K, V>(deserializer: D) -> Result<BTreeMap<K, V>, D::Error>
where
    D: Deserializer<'de>,
    K: Deserialize<'de> + Ord + fmt::Display,
    V: Serialize + DeserializeOwned,
{
    deserializer.deserialize_map(UniqueMap::<K, K, V, Plain>(PhantomData))
}

/// Reads a map with keys of type `T` by way of `K`.
struct UniqueMap<K, T, V, C>(PhantomData<(K, T, V, C)>);

impl<'de, K, T, V, C> Visitor<'de> for UniqueMap<K, T, V, C>
where
    K: Deserialize<'de> + Into<T>,
    T: Ord + fmt::Display,
    C: Codec<V>,
{
    type Value = BTreeMap<T, V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let mut map = BTreeMap::new();
        while let Some((key, value)) = access.next_entry::<K, Decoded<V, C>>()? {
            match map.entry(key.into()) {
                Entry::Vacant(entry) => entry.insert(value.0),
                Entry::Occupied(entry) => {
                    let key = crate::error::bounded(entry.key());
                    return Err(A::Error::custom(format_args!("the key {key:?} occurs twice")));
                }
            };
        }
        Ok(map)
    }
}

/// An address without zone. IPv6-mapped IPv4 becomes IPv4, as Cilium's readers do.
pub(crate) fn parse_ip(text: &str) -> Result<IpAddr, String> {
    text.parse::<IpAddr>()
        .map(|ip| ip.to_canonical())
        .map_err(|_| format!("{:?} is not an IP address", crate::error::bounded(text)))
}

/// Reads an object's key and tells which of the known fields it is.
pub(crate) struct FieldName(pub(crate) &'static [&'static str]);

impl<'de> DeserializeSeed<'de> for FieldName {
    type Value = Option<&'static str>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_identifier(self)
    }
}

impl Visitor<'_> for FieldName {
    type Value = Option<&'static str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field name")
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        let exact = self.0.iter().find(|name| **name == text);
        Ok(exact.or_else(|| self.0.iter().find(|name| name.eq_ignore_ascii_case(text))).copied())
    }
}

/// Declares a struct together with its JSON form. Per field, after its type: the JSON name and one of
/// - `always`: written even when zero; absent or `null` reads as zero,
/// - `omitempty`: not written when zero; absent or `null` reads as zero,
/// - `required`: always written; absent or `null` is an error,
///
/// then, optionally, `as` and the [`Codec`] to use.
macro_rules! go_object {
    (
        $(#[$meta:meta])*
        $vis:vis struct $name:ident {
            $( $(#[$field_meta:meta])* $field_vis:vis $field:ident : $ty:ty = $json:literal $mode:ident $(as $codec:ty)? ),* $(,)?
        }
    ) => {
        $(#[$meta])*
        $vis struct $name {
            $( $(#[$field_meta])* $field_vis $field: $ty, )*
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                use serde::ser::SerializeMap as _;
                let mut map = serializer.serialize_map(None)?;
                $( $crate::gojson::go_object!(@emit map, $json, $mode, self.$field, $ty $(, $codec)?); )*
                map.end()
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Reader;

                impl<'de> serde::de::Visitor<'de> for Reader {
                    type Value = $name;

                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str("an object")
                    }

                    fn visit_map<A: serde::de::MapAccess<'de>>(self, mut access: A) -> Result<$name, A::Error> {
                        use serde::de::Error as _;
                        const NAMES: &[&str] = &[$($json),*];
                        $( let mut $field: Option<Option<$ty>> = None; )*
                        while let Some(name) = access.next_key_seed($crate::gojson::FieldName(NAMES))? {
                            match name {
                                $( Some($json) => {
                                    if $field.is_some() {
                                        return Err(A::Error::duplicate_field($json));
                                    }
                                    type Read = $crate::gojson::go_object!(@decoded $ty $(, $codec)?);
                                    $field = Some(access.next_value::<Option<Read>>()?.map(|read| read.0));
                                } )*
                                _ => {
                                    access.next_value::<serde::de::IgnoredAny>()?;
                                }
                            }
                        }
                        Ok($name {
                            $( $field: $crate::gojson::go_object!(@finish A, $json, $mode, $field.flatten()), )*
                        })
                    }
                }

                deserializer.deserialize_map(Reader)
            }
        }
    };

    (@emit $map:ident, $json:literal, omitempty, $value:expr, $ty:ty $(, $codec:ty)?) => {
        if !$crate::gojson::Zero::is_zero(&$value) {
            $crate::gojson::go_object!(@emit $map, $json, always, $value, $ty $(, $codec)?);
        }
    };
    (@emit $map:ident, $json:literal, $mode:ident, $value:expr, $ty:ty) => {
        $map.serialize_entry($json, &$value)?
    };
    (@emit $map:ident, $json:literal, $mode:ident, $value:expr, $ty:ty, $codec:ty) => {
        $map.serialize_entry($json, &$crate::gojson::Encoded::<$ty, $codec>::new(&$value))?
    };

    (@decoded $ty:ty) => { $crate::gojson::Decoded<$ty, $crate::gojson::Plain> };
    (@decoded $ty:ty, $codec:ty) => { $crate::gojson::Decoded<$ty, $codec> };

    (@finish $access:ident, $json:literal, required, $value:expr) => {
        $value.ok_or_else(|| $access::Error::missing_field($json))?
    };
    (@finish $access:ident, $json:literal, $mode:ident, $value:expr) => {
        $value.unwrap_or_default()
    };
}
pub(crate) use go_object;

#[cfg(test)]
mod tests {
    use super::*;

    go_object! {
        #[derive(Debug, PartialEq)]
        struct Sample {
            name: String = "Name" always,
            note: String = "note" omitempty,
            other: String = "Note2" omitempty,
            id: u32 = "id" required,
            ip: Option<IpAddr> = "ip" always as NetIp,
            map: BTreeMap<String, u8> = "map" omitempty as ByName,
        }
    }

    fn read(text: &str) -> Result<Sample, ValueError> {
        decode(text.as_bytes(), 4096)
    }

    #[test]
    fn strings_are_escaped_as_go_escapes_them() {
        let text = "<a>&\u{2028}\u{2029}\"\\\u{8}\u{c}\n\r\t\u{1}\u{7f}é";
        let expected = br#""\u003ca\u003e\u0026\u2028\u2029\"\\\b\f\n\r\t\u0001"#;
        let encoded = encode(&text);
        assert!(encoded.starts_with(expected), "{encoded:?}");
        assert_eq!(decode::<String>(&encoded, 4096).expect("reads back"), text);
    }

    #[test]
    fn names_match_regardless_of_case_and_unknown_fields_are_ignored() {
        let sample =
            read(r#"{"NAME":"n","iD":7,"new":{"deep":[1,{}]},"IP":null,"map":null}"#).expect("reads");
        assert_eq!(sample.name, "n");
        assert_eq!(sample.id, 7);
        assert_eq!(encode(&sample).as_ref(), br#"{"Name":"n","id":7,"ip":""}"#);
    }

    #[test]
    fn an_error_names_the_field() {
        for (text, field, problem) in [
            (r#"{"id":-1}"#, "id", "invalid value"),
            (r#"{"id":4294967296}"#, "id", "invalid value"),
            (r#"{"id":1.5}"#, "id", "invalid type"),
            (r#"{"id":1,"id":2}"#, ".", "duplicate field `id`"),
            (r#"{"id":1,"Id":2}"#, ".", "duplicate field `id`"),
            (r#"{"id":1,"map":{"a":1,"a":2}}"#, "map", "\"a\" occurs twice"),
            (r#"{"id":1,"map":{"a":256}}"#, "map.a", "invalid value"),
            (r#"{"id":1,"ip":"1.2.3"}"#, "ip", "not an IP address"),
            (r#"{"Name":"n"}"#, ".", "missing field `id`"),
            (r#"{"id":null}"#, ".", "missing field `id`"),
            (r#"[]"#, ".", "invalid type"),
            (r#"{"id":1} x"#, ".", "trailing"),
            ("", ".", "EOF"),
        ] {
            match read(text) {
                Err(ValueError::Field { field: found, problem: says }) => {
                    assert_eq!(found, field, "{text}: {says}");
                    assert!(says.contains(problem), "{text}: {says}");
                }
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn deep_nesting_and_length_are_bounded() {
        let deep = format!(r#"{{"id":1,"x":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert!(matches!(
            decode::<Sample>(deep.as_bytes(), 100),
            Err(ValueError::TooLarge { limit: 100, .. })
        ));
        // Ignored without recursion: neither outcome may exhaust the stack.
        let _ = decode::<Sample>(deep.as_bytes(), 1 << 20);
    }
}

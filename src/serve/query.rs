//! Query strings, and forms in the same encoding.

/// The first value of a field, with percent encoding decoded.
pub fn field(query: &Option<String>, name: &str) -> Option<String> {
    fields(query, name).next()
}

/// All values of a field that may occur several times, in order.
pub fn fields<'a>(query: &'a Option<String>, name: &'a str) -> impl Iterator<Item = String> + 'a {
    let pairs = query.as_deref().unwrap_or_default().split('&');
    pairs.filter_map(move |pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then(|| plain(value))
    })
}

fn plain(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (vec![], 0);
    while at < bytes.len() {
        // A sign is not a digit, though numbers may begin with one.
        let digits = text
            .get(at + 1..at + 3)
            .filter(|d| bytes[at] == b'%' && d.bytes().all(|digit| digit.is_ascii_hexdigit()));
        match digits.and_then(|d| u8::from_str_radix(d, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(if bytes[at] == b'+' { b' ' } else { bytes[at] });
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_a_query_are_read() {
        let query = Some("name=a%20b%C3%A4+c.nii.gz&modality=ct&x&p=1&p=%32&p=3".to_string());
        assert_eq!(field(&query, "name").as_deref(), Some("a bä c.nii.gz"));
        assert_eq!(field(&query, "modality").as_deref(), Some("ct"));
        assert_eq!(field(&query, "x").as_deref(), Some(""));
        assert_eq!(field(&query, "y"), None);
        assert_eq!(field(&None, "y"), None);
        assert_eq!(fields(&query, "p").collect::<Vec<_>>(), ["1", "2", "3"]);
        for (odd, read) in
            [("%", "%"), ("%4", "%4"), ("%zz", "%zz"), ("%+1", "% 1"), ("ä%c3", "ä\u{fffd}")]
        {
            assert_eq!(plain(odd), read);
        }
    }
}
